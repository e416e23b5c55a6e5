"""WebShop (Yao et al., NeurIPS 2022): find a product by search, choose its options, buy it. `env.WebShop` is the world."""
