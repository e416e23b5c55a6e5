"""WebShop (Yao et al., NeurIPS 2022): find a product by search, choose its options and buy it; see `env.WebShop`."""
