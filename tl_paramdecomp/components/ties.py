"""Ties: sites whose components are another site's, transposed, as in a model that reads out by the weight it embeds with."""

from collections.abc import Collection, Mapping

from tl_paramdecomp.components.factors import check_transposes
from tl_paramdecomp.errors import SettingError
from tl_paramdecomp.sites import WeightSite


def check_ties(tied: Mapping[str, str], sites: Mapping[str, WeightSite], given: Collection[str]) -> None:
    """Refuse ties that cannot be.

    Args:
        tied: Site to the site whose components it takes, by canonical names.
        sites: The sites of a decomposition.
        given: Sites that have factors of their own.

    Raises:
        SettingError: A site is missing, tied to itself or to a tied one, has factors as well, or both are look-up tables.
        ShapeError: The shape of one is not that of the other transposed.
    """
    for name, source in tied.items():
        what = f"{name} is tied to {source}"
        for side in (name, source):
            if side not in sites:
                raise SettingError(f"{what}, but {side} is not among the sites: {', '.join(sites)}. Decompose both.")
        if name == source:
            raise SettingError(f"{name} is tied to itself; name the site whose components it should take.")
        if source in tied:
            raise SettingError(
                f"{what}, which is itself tied to {tied[source]}; ties do not form chains. Tie both to one site that is not "
                "tied, if the shapes allow it."
            )
        if name in given:
            raise SettingError(f"{what}, and so takes V and U from there; give factors for {source} alone.")
        if source not in given:
            raise SettingError(f"{what}, which has no factors; give V and U for {source}.")
        if sites[name].kind == sites[source].kind == "embedding":
            raise SettingError(
                f"{what}, and both look rows up by index. An embedding can be tied to a linear map, such as embed.W_E to "
                "unembed.W_U."
            )
        check_transposes(sites[name], sites[source])
