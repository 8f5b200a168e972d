"""The demo's toy world: drawn images with captions, their detector, the small frozen parts. Not in the wheel.

Start at `image_set.py`; `__main__.py` lists the commands.
"""
