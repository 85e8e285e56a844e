"""The rollout side: samplers, episodes, packs. It knows tokens and texts, never Flax or optax."""
