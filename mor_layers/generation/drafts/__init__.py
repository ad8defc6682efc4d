"""Drafts: tokens that are guessed cheaply and verified together."""
