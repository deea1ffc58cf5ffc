from kathikon_celery import enqueue_in
from shop.models import Order, Session
from shop.tasks import move_stock, receipt


def take_order(item, quantity):
    with Session.begin() as session:
        order = Order(item=item, quantity=quantity)
        session.add(order)
        session.flush()  # the order has its id
        with enqueue_in(session):
            receipt.delay(order.id)
            move_stock.delay(order.id)
        return order.id
