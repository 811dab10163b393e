"""Settings of the documentation, for ``make docs``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "extensions"), str(HERE.parent)]

import lightning_mtl

project = "lightning_mtl"
author = "The lightning_mtl contributors"
copyright = author  # noqa: A001 - Sphinx's name
version = release = lightning_mtl.__version__

extensions = [
    "myst_nb",  # Markdown and notebooks
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "mathml",
    "reference_pages",
]
exclude_patterns = ["_build", "extensions"]
# Where the sources can be read. Without it, links to files outside of docs/ offer the file itself.
repository = os.environ.get("LIGHTNING_MTL_REPOSITORY", "").rstrip("/")

myst_enable_extensions = ["attrs_inline", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebooks hold their outputs; a test executes them

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # overridden hooks are Lightning's to describe
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes that are documented twice are no duplicates then
napoleon_use_rtype = False
add_module_names = False
html_math_renderer = "mathml"

html_theme = "furo"
html_title = f"lightning_mtl {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}
html_show_sphinx = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
