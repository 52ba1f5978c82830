"""`moebox stats`: router statistics of a model as maps, a picture and replayed hit curves."""
