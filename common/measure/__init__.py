"""Operations by counting convention, speed and memory of a network. Imports ``run`` alone."""
