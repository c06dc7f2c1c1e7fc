"""The commands of `sdtune`, a module each, with `main(argv=None)`; nothing imports them but `sdtune/__main__.py`."""
