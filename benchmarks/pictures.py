def draw_comparison(path):
    pass
