"""Rollouts, rewards, references and preferences: what reinforcement learning adds to a source of batches."""
