"""SFT, reward models, DPO, KTO and PPO."""
