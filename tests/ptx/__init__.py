"""Executes PTX on the CPU, whoever compiled it."""
