"""Words that skills are about. Common and short, so that each becomes one token."""

NAMES = (
    "Ada Amir Anna Ben Bruno Carla Chen Clara Dana David Elena Emil Emma Eric Fatima Felix "
    "Finn Grace Hana Hugo Ida Igor Ines Ivan Jack Jana John Jonas Julia Karim Karl Kate Laila "
    "Lars Laura Leo Lena Lily Luca Maria Marco Martin Maya Mia Mila Nadia Nina Noah Nora Olga "
    "Omar Oscar Paul Peter Petra Priya Rosa Ruth Sam Sara Sofia Stefan Tara Tim Tom Vera "
    "Victor Yuki Zoe"
).split()

COLOURS = "amber black blue brown coral gold green grey ivory lime orange pink purple red silver \
violet white yellow".split()

ANIMALS = (
    "ant bat bear bee bird cat cow crab crow deer dog dove duck eagle fish fly fox frog goat goose "
    "hare hawk hen horse lamb lion lynx mole mouse mule otter owl ox pig pony rat raven seal sheep "
    "snake swan tiger toad trout whale wolf wren"
).split()

THINGS = (
    "apple arrow bag ball barn basket bell bench boat bone book boot bottle bowl box bread "
    "brick bridge broom brush bucket candle card carpet chair clock cloud coat coin cup "
    "curtain desk dish door dress drum egg engine feather fence flag flower fork garden gate "
    "glass glove hammer hat hill hook house jar key kite knife ladder lake lamp leaf lemon "
    "letter lock map mirror moon mountain nail needle nest net oven paint paper path pear pen "
    "pencil piano pipe plate pot ring river road roof rope saddle salt sand scarf shelf ship "
    "shirt shoe shovel spoon star stone stool stove sugar sun table tent thread ticket torch "
    "towel tower train tree trumpet umbrella vase violin wagon wall watch wheel window wire "
    "wood yard"
).split()

CITIES = (
    "Athens Berlin Bogota Boston Cairo Delhi Dublin Geneva Hanoi Havana Kyoto Lagos Lima Lisbon "
    "London Madrid Milan Nairobi Oslo Paris Porto Prague Quito Riga Rome Seoul Sofia Tokyo Vienna "
    "Warsaw"
).split()

LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
