"""The plugin of PEFT: puts prompts and fusions into the towers of a model, and takes them out again."""
