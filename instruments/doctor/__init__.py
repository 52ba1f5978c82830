"""instruments/doctor"""
