"""The passes, one a file: `rewrite` on the captured graph, `inductor` on Inductor's own graphs."""

if __name__ == "passes":
    raise ImportError("this folder is fp8fx's; import it as fp8fx.passes")
