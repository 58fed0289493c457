"""User configuration: the recipe's sections and DeepSpeed's JSON, both read strictly."""
