"""What an agent asks for, parsed and checked, and the grant that answers it.

May import configuration, units and errors.
"""
