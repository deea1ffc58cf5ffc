from celery import Celery
from sqlalchemy import update

from kathikon_celery import current_session
from shop.models import DATABASE_URL, Move, Order, Receipt, Session, Stock

app = Celery("shop")
app.config_from_object("kathikon_celery.config")
app.conf.kathikon_database_url = DATABASE_URL  # the jobs are in the database of the orders


@app.task(transaction=Session)
def receipt(order_id):
    current_session().add(Receipt(order_id=order_id))


@app.task(bind=True, transaction=Session)
def move_stock(self, order_id):
    order = self.session.get(Order, order_id)
    moved = update(Stock).where(Stock.item == order.item).values(quantity=Stock.quantity - order.quantity)
    self.session.execute(moved)
    self.session.add(Move(order_id=order_id, quantity=order.quantity))
