from shop.models import Base, Session, Stock, engine

Base.metadata.create_all(engine)
with Session.begin() as session:
    session.merge(Stock(item="tea", quantity=100_000))
