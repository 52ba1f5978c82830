"""src/moebox/commands"""
