from typing import Annotated

from fastapi import Body, FastAPI

from shop.orders import take_order

api = FastAPI()


@api.post("/orders")
def orders(item: Annotated[str, Body()], quantity: Annotated[int, Body(gt=0)] = 1) -> dict[str, int]:
    return {"order": take_order(item, quantity)}
