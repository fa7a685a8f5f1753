/* Included by BCC; the gate needs nothing from it. */
