"""Packaging: version, description, requirements and scripts are read from settings.ini."""
from configparser import ConfigParser
from setuptools import setup

config = ConfigParser(delimiters=['='])
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
setup(version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'].split(),
      install_requires=cfg['requirements'].split(), extras_require={name.removesuffix('_requirements'): cfg[name].split() for name in cfg if name.endswith('_requirements')},
      entry_points={'console_scripts': cfg['console_scripts'].split(),
                    'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]})
