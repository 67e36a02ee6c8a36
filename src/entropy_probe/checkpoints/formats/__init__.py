"""Checkpoint formats: one layout of folders, one file, and one line in :data:`~.registry.FORMATS`.

A new format is a class with the methods of :class:`~.base.Format`. It says how a folder is recognised and what is in it; the
kinds of files that it is made of are opened by ``checkpoints/files/``, and models are built, filled and matched with their
optimizer by the files beside this folder, which know no layout.
"""
