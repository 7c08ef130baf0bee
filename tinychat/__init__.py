"""tinychat: 4-bit language models on the device in front of you."""
