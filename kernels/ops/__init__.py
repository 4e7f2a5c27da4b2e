"""Operations, one a file, forward and backward."""
