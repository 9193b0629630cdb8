"""Derisking ladders: a baseline and single changes of it trained at several sizes, and what may be concluded.

`results` is what goes in and comes out, `fit` is loss against compute, `verdict` is what each change is worth and
whether it holds at the target. README.md has the statistics and how well they do on ladders whose truth is known.
"""
