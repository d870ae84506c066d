"""PPO and the estimators beside it."""
