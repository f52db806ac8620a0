"""Domain sentences: the CodecLM pipeline of the DAS paper over language models, and seeded template grammars."""
