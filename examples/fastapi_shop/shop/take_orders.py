import sys

from shop.orders import take_order

number = int(sys.argv[1])
for one in range(number):
    take_order("tea", 1 + one % 3)
print(f"{number} orders taken")
