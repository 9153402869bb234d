"""The mathematics of PPO with KL control: pure functions of tensors. Imports torch, itself and alignkit.schema.

Read in this order: types, masked, sequence, kl, shaping, advantage, losses, control, schedule.
"""
