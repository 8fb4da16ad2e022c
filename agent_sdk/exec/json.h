// SPDX-License-Identifier: Apache-2.0
/* JSON (RFC 8259) as far as a hook needs it: strings out of a document, and a string into one. */
#ifndef AGENTCG_JSON_H
#define AGENTCG_JSON_H

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { JSON_DEPTH_MAX = 64 };

static const char *json_space(const char *at)
{
	return at + strspn(at, " \t\r\n");
}

/* Returns what follows a string that begins at `at`; NULL: there is none. */
static const char *json_skip_string(const char *at)
{
	if (*at++ != '"')
		return NULL;
	for (; *at != '"'; at++) {
		if ((unsigned char)*at < ' ')
			return NULL;
		if (*at != '\\')
			continue;
		at++;
		if (*at == 'u' && strspn(at + 1, "0123456789abcdefABCDEF") < 4)
			return NULL;
		if (!*at || !strchr("\"\\/bfnrtu", *at))
			return NULL;
	}
	return at + 1;
}

/* Returns what follows a value; NULL: the text is no JSON, or nested too deep. */
static const char *json_skip(const char *at, int depth)
{
	char open = *(at = json_space(at)), close = open == '{' ? '}' : ']';
	static const char *const words[] = { "true", "false", "null" };

	if (open == '"')
		return json_skip_string(at);
	for (size_t i = 0; i < sizeof(words) / sizeof(*words); i++)
		if (!strncmp(at, words[i], strlen(words[i])))
			return at + strlen(words[i]);
	if (open != '{' && open != '[')
		return strchr("-0123456789", open) && open ? at + strspn(at, "+-.0123456789eE") :
							     NULL;
	if (depth >= JSON_DEPTH_MAX)
		return NULL;
	at = json_space(at + 1);
	if (*at == close)
		return at + 1;
	for (;;) {
		if (open == '{') {
			at = json_skip_string(json_space(at));
			if (!at || *(at = json_space(at)) != ':')
				return NULL;
			at++;
		}
		at = json_skip(at, depth + 1);
		if (!at)
			return NULL;
		at = json_space(at);
		if (*at == close)
			return at + 1;
		if (*at++ != ',')
			return NULL;
	}
}

static unsigned int json_hex(const char *at)
{
	char digits[5] = {};

	memcpy(digits, at, 4);
	return strtoul(digits, NULL, 16);
}

static char *json_put_utf8(char *to, unsigned int c)
{
	if (c < 0x80) {
		*to++ = c;
	} else if (c < 0x800) {
		*to++ = 0xc0 | c >> 6;
		*to++ = 0x80 | (c & 0x3f);
	} else if (c < 0x10000) {
		*to++ = 0xe0 | c >> 12;
		*to++ = 0x80 | (c >> 6 & 0x3f);
		*to++ = 0x80 | (c & 0x3f);
	} else {
		*to++ = 0xf0 | c >> 18;
		*to++ = 0x80 | (c >> 12 & 0x3f);
		*to++ = 0x80 | (c >> 6 & 0x3f);
		*to++ = 0x80 | (c & 0x3f);
	}
	return to;
}

/* Returns a string's text, to be freed, without NULs in it; NULL: it is no string. */
static char *json_text(const char *at)
{
	static const char plain[] = "\"\\/bfnrt", meant[] = "\"\\/\b\f\n\r\t";
	const char *end;
	char *text, *to;
	unsigned int c, low;

	at = json_space(at);
	end = *at == '"' ? json_skip_string(at) : NULL;
	text = to = end ? malloc(end - at) : NULL;
	if (!text)
		return NULL;
	for (at++; at < end - 1; at++) {
		if (*at != '\\') {
			*to++ = *at;
			continue;
		}
		if (*++at != 'u') {
			*to++ = meant[strchr(plain, *at) - plain];
			continue;
		}
		c = json_hex(at + 1);
		at += 4;
		low = c >> 10 == 0x36 && at[1] == '\\' && at[2] == 'u' ? json_hex(at + 3) : 0;
		if (low >> 10 == 0x37) {
			c = 0x10000 + ((c & 0x3ff) << 10) + (low & 0x3ff);
			at += 6;
		} else if (c >> 11 == 0x1b || !c) {
			c = 0xfffd; /* half of a pair, or a NUL */
		}
		to = json_put_utf8(to, c);
	}
	*to = 0;
	return text;
}

/* Returns the value of a key of an object that json_skip() has read; NULL: it has none. */
static const char *json_find(const char *object, const char *key)
{
	bool found;
	char *name;

	if (!object || *(object = json_space(object)) != '{')
		return NULL;
	object = json_space(object + 1);
	while (*object == '"') {
		name = json_text(object);
		found = name && !strcmp(name, key);
		free(name);
		object = json_space(json_skip_string(object)) + 1; /* behind the colon */
		if (found)
			return json_space(object);
		object = json_space(json_skip(object, 0));
		if (*object == ',')
			object = json_space(object + 1);
	}
	return NULL;
}

/* The text of a key's value, to be freed; NULL: it has none, or one that is no string. */
static char *json_find_text(const char *object, const char *key)
{
	const char *value = json_find(object, key);

	return value ? json_text(value) : NULL;
}

static void json_print(FILE *to, const char *text)
{
	fputc('"', to);
	for (; *text; text++)
		if (*text == '"' || *text == '\\')
			fprintf(to, "\\%c", *text);
		else if ((unsigned char)*text < ' ')
			fprintf(to, "\\u%04x", *text);
		else
			fputc(*text, to);
	fputc('"', to);
}

#endif
