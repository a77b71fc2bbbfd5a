"""Packaging: version, description, requirements and scripts are read from settings.ini."""
import json
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup
from setuptools.command.build_py import build_py

config = ConfigParser(delimiters=['='])
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

class BuildWithNotebooks(build_py):
    "The notebooks that commands execute go into the package; in nbs/ they are the source."
    def run(self):
        super().run()
        if self.editable_mode: return       # it finds them in nbs/
        folder = Path(self.build_lib)/cfg['lib_name']/'notebooks'
        folder.mkdir(parents=True, exist_ok=True)
        for name in cfg['package_notebooks'].split():
            notebook = json.loads((Path(cfg['nbs_path'])/name).read_text(encoding='utf-8'))
            # the outputs are those of the project's own runs
            for cell in notebook['cells']: cell.update({'outputs': [], 'execution_count': None} if cell['cell_type'] == 'code' else {})
            (folder/name).write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')

setup(version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'].split(), cmdclass={'build_py': BuildWithNotebooks},
      install_requires=cfg['requirements'].split(), extras_require={name.removesuffix('_requirements'): cfg[name].split() for name in cfg if name.endswith('_requirements')},
      entry_points={'console_scripts': cfg['console_scripts'].split(),
                    'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]})
