"""Commands of `moebox`: one file each, with a click command of its name; `options` and `output` serve all."""
