"""The net: variants as data, layers, AlexNet, and the same net from stock torch.nn."""
