"""Lets the site have the repository's own documents, at their own paths, so that their links hold on both."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parent.parent
PAGES = ('README.md', 'CHANGELOG.md', 'CONTRIBUTING.md', 'method_cards/*.md', 'benchmarks/README.md')
#: What pages show or link to.
BESIDE = ('LICENSE', 'method_cards/images/*', 'examples/*.py', 'yamls/**/*.yaml')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds them; called by mkdocs when it has read ``docs_dir``."""
    for patterns, level in ((PAGES, InclusionLevel.UNDEFINED), (BESIDE, InclusionLevel.NOT_IN_NAV)):
        for path in sorted(path for pattern in patterns for path in ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls, inclusion=level))
    return files
