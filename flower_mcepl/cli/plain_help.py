"""Help pages that say what the commands say."""

import inspect
from typing import Any, final, get_type_hints

from typer.core import TyperArgument, TyperCommand


@final
class PlainCommand(TyperCommand):
    r"""A command whose help page has its arguments' texts, and brackets as they are.

    Two faults of typer before 0.21, and Flower takes no newer one: with click 8.5 the
    text of an argument gets lost, and where rich is installed ``[required]`` becomes
    ``\[required]``, though rich does not print here.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        hints = (
            get_type_hints(inspect.unwrap(self.callback), include_extras=True)
            if self.callback
            else {}
        )
        for parameter in self.params:
            if isinstance(parameter, TyperArgument) and parameter.help is None:
                parameter.help = hints[str(parameter.name)].__metadata__[0].help

    def format_arguments(self, ctx: Any, formatter: Any) -> None:
        """Write nothing: click 8.5 would list the arguments a second time."""

    def get_help(self, ctx: Any) -> str:
        """Return the help page."""
        return super().get_help(ctx).replace(r"\[", "[")
