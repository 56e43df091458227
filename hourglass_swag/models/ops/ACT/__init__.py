"""Adaptive clustering attention; see ``ada_clustering_attention``. ``../setup.py`` builds its operators."""
