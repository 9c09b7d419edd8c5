"""How a model's weights divide over ranks: plans (pure data), where they come from, and applying them."""
