"""The studio: a page to watch samples being refined, stop, erase and refine on (`python -m grn.studio`).

`engine` draws, `views` makes pictures of it, `models` has the open checkpoints: none of these knows of a page. `page`
and the tabs are the page (NiceGUI), `server` serves it.
"""
