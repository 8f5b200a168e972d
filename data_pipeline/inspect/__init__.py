"""What a manifest holds, in figures and on a contact sheet.

Start at `inspection.py`.
"""
