"""What is wrong in `--cfg-options` is named."""

from pathlib import Path

import pytest

from mmbackbones.apis.command_line import add_launcher, make_parser
from mmbackbones.apis.config import load_config

CONFIG = Path(__file__).parent.parent / 'configs' / 'dfine_demo.py'


def test_a_misspelt_key_is_an_error(tmp_path: Path) -> None:
    """Else it would be added, and change nothing."""
    for key, similar in (
        ('trian_cfg.max_epochs', "; did you mean 'train_cfg'?"),
        ('zzz', "the Runner has 'zzz'$"),
    ):
        with pytest.raises(ValueError, match=f'--cfg-options {key}: .*{similar}'):
            load_config(str(CONFIG), work_dir=str(tmp_path), cfg_options={key: 1})


def test_keys_that_only_the_runner_has_are_taken(tmp_path: Path) -> None:
    options = {'load_from': 'a.pth', 'compile': True, 'find_unused_parameters': True}
    cfg = load_config(str(CONFIG), work_dir=str(tmp_path), cfg_options=options)
    assert cfg.load_from == 'a.pth' and cfg.compile and cfg.find_unused_parameters


def test_only_tools_that_run_as_several_processes_take_a_launcher() -> None:
    parser = make_parser('A tool.')
    given = ['config.py', '--launcher', 'pytorch', '--local-rank', '1']
    with pytest.raises(SystemExit, match='2'):
        parser.parse_args(given)
    add_launcher(parser)
    assert parser.parse_args(given).launcher == 'pytorch'
