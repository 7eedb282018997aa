"""Settings of Sphinx for the book; `labkit.authoring.book` copies this file beside the chapters."""

extensions = ["myst_nb", "sphinx.ext.mathjax"]
project = html_title = "The quantization workbook"
language = "en"
exclude_patterns = ["extra"]

# The pages show what is stored in the notebooks; nothing is executed.
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3

html_theme = "sphinx_book_theme"
html_theme_options = {
    # Each of these buttons would lead to a server, or to a copy that lacks the explorers.
    "use_download_button": False,
    "use_edit_page_button": False,
    "use_issues_button": False,
    "use_repository_button": False,
    "use_source_button": False,
    "footer_content_items": [],
    "navbar_persistent": [],
    "primary_sidebar_end": [],
    "show_toc_level": 1,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_context = {"default_mode": "auto"}
html_copy_source = False
html_use_index = False
html_show_copyright = False
html_show_sphinx = False
html_last_updated_fmt = None
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_extra_path = ["extra"]
mathjax_path = "tex-svg.js"  # a local copy in one file, fonts and all
# Its menu would load parts that are not here.
mathjax3_config = {"options": {"enableMenu": False}}
