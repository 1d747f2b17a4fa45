/*
 * A floor of `make bench`: the milter in C that does nothing, as milters mostly are written: a callback for each stage,
 * nothing negotiated, so that the MTA sends everything and waits for each answer.
 *
 * cc -O2 libmilter.c -lmilter -lpthread; its argument is the socket, as inet:PORT@127.0.0.1.
 */
#include <libmilter/mfapi.h>

static sfsistat on_connect(SMFICTX *ctx, char *name, _SOCK_ADDR *address)
{
	return SMFIS_CONTINUE;
}

static sfsistat on_text(SMFICTX *ctx, char *name)
{
	return SMFIS_CONTINUE;
}

static sfsistat on_envelope(SMFICTX *ctx, char **arguments)
{
	return SMFIS_CONTINUE;
}

static sfsistat on_header(SMFICTX *ctx, char *name, char *value)
{
	return SMFIS_CONTINUE;
}

static sfsistat on_body(SMFICTX *ctx, unsigned char *bytes, size_t length)
{
	return SMFIS_CONTINUE;
}

static sfsistat on_stage(SMFICTX *ctx)
{
	return SMFIS_CONTINUE;
}

int main(int argc, char **argv)
{
	struct smfiDesc milter = {
		.xxfi_name = "nothing",
		.xxfi_version = SMFI_VERSION,
		.xxfi_connect = on_connect,
		.xxfi_helo = on_text,
		.xxfi_envfrom = on_envelope,
		.xxfi_envrcpt = on_envelope,
		.xxfi_header = on_header,
		.xxfi_eoh = on_stage,
		.xxfi_body = on_body,
		.xxfi_eom = on_stage,
		.xxfi_abort = on_stage,
		.xxfi_close = on_stage,
	};

	if (argc != 2 || smfi_setconn(argv[1]) == MI_FAILURE || smfi_register(milter) == MI_FAILURE)
		return 64;
	return smfi_main() == MI_SUCCESS ? 0 : 1;
}
