def bench(): return []
