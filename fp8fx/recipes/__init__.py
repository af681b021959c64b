"""How operands are quantized: formats, recipes, and the arithmetic."""
