"""Is FP8 worth it?"""
