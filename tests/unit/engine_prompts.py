"""What the tests of an engine of one rank ask it."""

PROMPTS = ["The king", "O", "To be, or not to be, that is the question", "War and peace"]
