"""When things happen: SFT, reward models, DPO, KTO and PPO, each an iterator over its steps."""
