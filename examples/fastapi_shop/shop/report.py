from sqlalchemy import func, select

from shop.models import Move, Order, Receipt, Session, Stock

with Session() as session:
    for name, table in (("orders", Order), ("receipts", Receipt), ("moves", Move)):
        print(f"{name}: {session.scalar(select(func.count()).select_from(table))}")
    ordered = session.scalar(select(func.coalesce(func.sum(Order.quantity), 0)))
    print(f"tea in stock and ordered: {session.get(Stock, 'tea').quantity + ordered}")
