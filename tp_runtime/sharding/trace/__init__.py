"""Reading a sharding plan off one forward pass: labels of elements, the rules that carry them, integers."""
